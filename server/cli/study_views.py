"""Tables and lines for a terminal: studies, their arms and their decisions.

All functions take the API's JSON. Cells are `Text`, so that a name is never read as markup.
"""

import json
import time
from collections.abc import Sequence
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.text import Text

from server.cli.live import LiveLines, describe_seconds_left, format_duration
from server.cli.views import STATUS_STYLES, make_table, name_cell
from server.judging.numbers import NO_VALUE, format_decimals, format_share
from server.texts import list_some

Json = dict[str, Any]

_STATE_STYLES = {
    "decided": "bold green",
    "narrowed": "bold cyan",
    "undecided": "bold yellow",
    "none": "bold red",
    "no_data": "bold yellow",
}
_ARM_STYLES = {"recommended": "bold green", "kept": "", "ruled out": "red"}
_ENDED: Final = frozenset({"succeeded", "failed", "cancelled", None})  # None: the job was deleted
#: Arms in the line of a study in the list.
_MAX_LISTED_ARMS: Final = 4


class StudyProgress(LiveLines):
    """One live line per arm and one for the study; without a terminal, one line per ended job."""

    _seen_first: tuple[float, float] | None = None  # when, and the progress

    def update(self, study: Json) -> None:
        """Show the study's progress."""
        left = self._describe_time_left(study)
        if not self.is_live:
            state = (study["status"], len(study["seeds"]), _count_ended(study["arms"]))
            line = f"{_describe_progress(study)}  {left}"
            self.print_change(study["id"], line, state=state)
            return
        for arm in study["arms"]:
            completed = _count_ended([arm]) / max(1, len(arm["seeds"]))
            self.show(arm["arm"], label=arm["arm"], completed=completed, numbers=_describe_arm(arm))
        # After the arms, of which none has an empty name.
        self.show(
            "",
            label=f"study {study['id']}",
            completed=study["progress"],
            numbers=_describe_jobs(study),
            left=left,
        )

    def _describe_time_left(self, study: Json) -> str:
        """By the server, which knows once a job has ended; before, by the progress since it was
        first seen."""
        if study["seconds_left"] is not None or not study["progress"]:
            return _describe_time_left(study, study["seconds_left"])
        now, progress = time.monotonic(), study["progress"]
        then, progress_then = self._seen_first = self._seen_first or (now, progress)
        if progress <= progress_then or progress == 1:
            return ""
        seconds = (now - then) * (1 - progress) / (progress - progress_then)
        return _describe_time_left(study, seconds)


def study_view(study: Json) -> RenderableType:
    """The state of a study, then its result so far."""
    name = f"  {study['name']}" if study["name"] else ""
    line = Text.assemble(
        (f"Study {study['id']}{name}", "bold"),
        "  ",
        (study["status"], STATUS_STYLES.get(study["status"], "")),
        "" if study["criteria_set"] == "spec" else f"  criteria: {study['criteria_set']}",
        f"  {_describe_jobs(study)}  {_describe_time_left(study, study['seconds_left'])}",
    )
    return Group(line, study_result(study))


def study_result(study: Json) -> RenderableType:
    """One line per arm, then the decision."""
    table = make_table(
        "Arm", ">Passed", ">95 %\ninterval", ">Median\nIoU", "State", "Failed\ncriteria"
    )
    for arm in study["arms"]:
        table.add_row(*_arm_cells(arm, recommended=study["recommendation"]["arm"]))
    return Group(table, _decision_text(study["recommendation"]), *_notes(study))


def plan_view(plan: Json) -> RenderableType:
    """What a study would be, after `--dry-run`."""
    varied = _find_varied([arm["config"] for arm in plan["arms"]])
    table = make_table("Arm", "Option", "Settings")
    for arm in plan["arms"]:
        settings = "  ".join(f"{key}={_show_value(arm['config'][key])}" for key in varied)
        table.add_row(Text(arm["arm"]), Text(arm["option"]), Text(settings))
    return Group(table, *(Text(line) for line in _describe_plan(plan)))


def studies_table(page: Json) -> RenderableType:
    """One line per study, newest first."""
    table = make_table("Study", "Name", "Status", "Arms", ">Seeds", ">Jobs", ">Progress")
    for study in page["data"]:
        table.add_row(
            Text(study["id"]),
            name_cell(study["name"] or ""),
            Text(study["status"], style=STATUS_STYLES.get(study["status"], "")),
            Text(list_some(study["arms"], limit=_MAX_LISTED_ARMS)),
            Text(str(study["num_seeds"])),
            Text(str(study["num_jobs"])),
            Text(format_share(study["progress"])),
        )
    if page["has_more"]:
        return Group(table, Text("There are more; raise --limit.", style="dim"))
    return table if page["data"] else Text("No studies.")


def deleted_text(deleted: Json) -> RenderableType:
    """What was deleted with a study."""
    jobs = f"{deleted['num_jobs_deleted']} jobs deleted, {deleted['num_jobs_kept']} kept"
    return Text(f"Study {deleted['id']} deleted: {jobs}.")


def _arm_cells(arm: Json, *, recommended: str | None) -> list[Text]:
    state = "recommended" if arm["arm"] == recommended else arm["state"].replace("_", " ")
    interval = arm["pass_rate_interval"]
    return [
        Text(arm["arm"]),
        Text(f"{arm['num_passed']} of {arm['num_judged']}"),
        Text(" to ".join(format_decimals(end) for end in interval) if interval else NO_VALUE),
        Text(format_decimals(arm["metrics"]["val_foreground_iou"]["median"])),
        Text(state, style=_ARM_STYLES.get(state, "")),
        Text(_list_failed_criteria(arm)),
    ]


def _list_failed_criteria(arm: Json) -> str:
    """One per line, those that failed most often first."""
    short = [each for each in arm["criteria"] if each["num_passed"] < arm["num_judged"]]
    short.sort(key=lambda each: int(each["num_passed"]))
    return "\n".join(_describe_criterion(each) for each in short)


def _describe_criterion(criterion: Json) -> str:
    """Its name, and in how many seeds it failed unless that is all of them."""
    num_judged = criterion["num_judged"]
    num_failed = num_judged - criterion["num_passed"]
    if not num_failed:
        return f"{criterion['name']} no data"
    share = f" {num_failed} of {num_judged}" if criterion["num_passed"] else ""
    return f"{criterion['name']}{share}"


def _decision_text(recommendation: Json) -> Text:
    style = _STATE_STYLES.get(recommendation["state"], "")
    return Text.assemble(("Decision: ", style), f"{recommendation['reason']}.")


def _notes(study: Json) -> list[Text]:
    num_missing = sum(arm["num_missing"] for arm in study["arms"])
    if not num_missing:
        return []
    lost = "1 job was lost" if num_missing == 1 else f"{num_missing} jobs were lost"
    text = f"{lost} or cancelled and count for nothing; losslab study resume {study['id']}"
    return [Text(f"{text} trains what is missing.", style="yellow")]


def _describe_plan(plan: Json) -> list[str]:
    num_jobs, num_seeds = plan["num_jobs"], len(plan["seeds"])
    more = f", at most {plan['max_num_jobs']}" if plan["max_num_jobs"] > num_jobs else ""
    reused = f"; {plan['num_reused']} of them are reused" if plan["num_reused"] else ""
    seconds = plan["estimated_seconds"]
    when = "not known before a job has succeeded" if seconds is None else format_duration(seconds)
    return [
        f"Jobs   {num_jobs}: {_count(len(plan['arms']), 'arm')}, {_count(num_seeds, 'seed')}"
        f"{more}{reused}",
        f"Looks  {', '.join(map(str, plan['looks']))} seeds",
        f"Time   {when}",
        "Nothing was queued.",
    ]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _find_varied(configs: Sequence[Json]) -> list[str]:
    """The settings that are not the same in all arms."""
    first = configs[0]
    return [key for key in first if any(config[key] != first[key] for config in configs)]


def _show_value(value: Any) -> str:
    """As `--grid` and `--set` take it."""
    return value if isinstance(value, str) else json.dumps(value)


def _describe_progress(study: Json) -> str:
    arms = [f"{arm['arm']} {arm['num_passed']}/{arm['num_judged']}" for arm in study["arms"]]
    return "  ".join([study["status"], _describe_jobs(study), *arms])


def _describe_arm(arm: Json) -> str:
    state = ", ruled out" if arm["state"] == "ruled_out" else ""
    return f"{arm['num_passed']}/{arm['num_judged']} passed{state}"


def _describe_jobs(study: Json) -> str:
    return f"{_count_ended(study['arms'])} of {study['num_jobs']} jobs"


def _describe_time_left(study: Json, seconds: float | None) -> str:
    """Of a race, the time to its next look."""
    left = describe_seconds_left(seconds)
    return f"{left} to the next look" if left and study["until_decided"] else left


def _count_ended(arms: Sequence[Json]) -> int:
    return sum(seed["status"] in _ENDED for arm in arms for seed in arm["seeds"])
