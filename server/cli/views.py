"""Tables and lines for a terminal: jobs, epochs, verdicts and comparisons.

All functions take the API's JSON. Cells are `Text`, so that a job's name is never read as markup.
"""

from pathlib import Path
from typing import Any, Final

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from server.cli.live import LiveLines, describe_seconds_left
from server.judging.numbers import NO_VALUE, format_decimals, format_share
from server.models.options import OPTIONS

Json = dict[str, Any]

STATUS_STYLES = {
    "queued": "dim",
    "running": "cyan",
    "paused": "yellow",
    "succeeded": "green",
    "failed": "red",
    "cancelled": "yellow",
}
_OUTCOME_STYLES = {"success": "bold green", "failure": "bold red", "undecided": "yellow"}
_CRITERION_STYLES = {
    "passed": "green",
    "failed": "red",
    "no_data": "dim",
    "not_applicable": "dim",
}
#: The columns that may be narrower than their texts.
_WRAPPED: Final = (
    *("Explanation", "Failed\ncriteria", "Settings", "Summary"),
    *("Name", "Arm", "Arms", "Option", "Base"),
)
#: The settings of the loss, in which options differ; others make a comparison doubtful.
_LOSS_SETTINGS: Final = {
    *("option", "use_focal_loss", "beta", "beta_schedule", "beta_warmup_fraction", "free_bits"),
    *(key for option in OPTIONS.values() for key in option.config),
}


class JobProgress(LiveLines):
    """One live line per job; without a terminal, one line per epoch."""

    def update(self, job: Json) -> None:
        """Show the job's progress."""
        label, numbers = f"option {job['option']}", _describe_numbers(job)
        left = _describe_time_left(job)
        if self.is_live:
            self.show(job["id"], label=label, completed=job["progress"], numbers=numbers, left=left)
        else:
            state = (job["status"], job["epochs_completed"])
            self.print_change(job["id"], f"{label}  {numbers}  {left}", state=state)


def jobs_table(page: Json) -> RenderableType:
    """One line per job, newest first."""
    table = make_table("Job", "Name", "Option", "Status", "Epochs", ">Accuracy", ">Recall")
    for job in page["data"]:
        table.add_row(
            Text(job["id"]),
            name_cell(job["name"] or ""),
            name_cell(job["option"]),
            _status_text(job),
            Text(_describe_epochs(job)),
            Text(format_share(job["train_pixel_accuracy"])),
            Text(format_decimals(job["val_foreground_recall"])),
        )
    if page["has_more"]:
        return Group(
            table,
            Text(
                "There are more; raise --limit, or filter by --status, --option or --name.",
                style="dim",
            ),
        )
    return table if page["data"] else Text("No jobs.")


def options_table(page: Json) -> RenderableType:
    """One line per option, the built-in ones first."""
    table = make_table("Option", "Base", ">Jobs", "Settings", "Summary")
    for option in page["data"]:
        table.add_row(
            Text(option["name"]),
            Text(option["base"] or NO_VALUE),
            Text(str(option["num_jobs"])),
            Text(_describe_settings(option["overrides"])),
            Text(option["summary"]),
        )
    return table


def datasets_table(page: Json) -> RenderableType:
    """One line per data set, and one per file that is none."""
    table = make_table("Data set", ">Bytes", "Modified")
    for dataset in page["data"]:
        size, modified = dataset["size_bytes"], dataset["modified_at"]
        table.add_row(
            Text(dataset["name"]),
            Text(NO_VALUE if size is None else f"{size:,}"),
            Text("built in" if dataset["is_built_in"] else modified),
        )
    left_out = page.get("left_out") or []
    lines = [Text(f"{each['file_name']} is left out: {each['reason']}") for each in left_out]
    return Group(table, *lines)


def dataset_view(dataset: Json) -> RenderableType:
    """A data set and what was done to the file that it came from."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    sizes = (f"{key} {number:,}" for key, number in dataset["num_grids"].items())
    size = dataset["grid_size"]
    table.add_row("data set", Text(dataset["name"], style="bold"))
    table.add_row("grids", Text(f"{', '.join(sizes)}, of {size}x{size} cells"))
    table.add_row("background", Text(format_share(dataset["background_share"])))
    if dataset.get("note"):
        table.add_row("from", Text(dataset["note"]))
    return table


def option_view(option: Json) -> RenderableType:
    """An option and the settings in which it differs from its base."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_row("option", Text(option["name"], style="bold"))
    table.add_row("base", Text(option["base"] or NO_VALUE))
    table.add_row("settings", Text(_describe_settings(option["overrides"]) or NO_VALUE))
    table.add_row("summary", Text(option["summary"] or NO_VALUE))
    table.add_row("jobs", Text(str(option["num_jobs"])))
    return table


def job_view(job: Json) -> RenderableType:
    """The job's state and its configuration."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    title = f"{job['id']}  {job['name'] or ''}"
    table.add_row("job", Text(title.rstrip(), style="bold"))
    table.add_row("option", Text(job["option"] + ("  quick test" if job["quick_test"] else "")))
    table.add_row("status", _status_text(job))
    if job["error"]:
        table.add_row("error", Text(f"{job['error']['message']} ({job['error']['code']})"))
    table.add_row("progress", Text(_describe_numbers(job, with_status=False)))
    table.add_row("best epoch", Text(str(job["best_epoch"] or NO_VALUE)))
    table.add_row("device", Text(job["device"] or NO_VALUE))
    table.add_row("made by", Text(_describe_provenance(job) or NO_VALUE))
    summary = job["dataset_summary"] or {}
    available = summary.get("num_available", {}).get("train")
    if available is not None and "num_train" in summary:
        used = f"{summary['num_train']:,} of {available:,} training grids used"
        table.add_row("data", Text(used))
    table.add_row("config", Text(_describe_settings(job["config"])))
    return table


def _describe_provenance(job: Json) -> str:
    """The program and the machine; servers of older versions do not say it."""
    made_by = job.get("provenance")
    if not made_by:
        return ""
    changed = ", changed" if made_by["is_changed"] else ""
    commit = f" ({made_by['revision'][:12]}{changed})" if made_by["revision"] else changed
    return (
        f"Losslab {made_by['losslab_version']}{commit}, torch {made_by['torch_version']}, "
        f"{made_by['number_format']}, on {made_by['host']}"
    )


def epochs_table(rows: list[Json]) -> RenderableType:
    """One line per epoch; the average precision is that of the foreground."""
    table = make_table(
        *(">Epoch", ">Loss", ">Val.\nloss", ">Accuracy", ">Recall", ">IoU"),
        *(">AP", ">KL\nmin", ">Seconds"),
    )
    for row in rows:
        table.add_row(
            Text(str(row["epoch"])),
            Text(format_decimals(row["train_loss"], digits=4)),
            Text(format_decimals(row["val_loss"], digits=4)),
            Text(format_share(row["train_pixel_accuracy"])),
            Text(format_decimals(row["val_foreground_recall"])),
            Text(format_decimals(row["val_foreground_iou"])),
            Text(format_decimals(row["val_foreground_ap"])),
            Text(format_decimals(min(row["train_kl_per_dimension"], default=None))),
            Text(format_decimals(row["seconds"], digits=1)),
        )
    return table


def verdict_view(verdict: Json) -> RenderableType:
    """The outcome with its diagnosis, then each criterion with its status and explanation."""
    headline = Text.assemble(
        "Verdict: ", _verdict_text(verdict), f" (criteria: {verdict['criteria_set']})"
    )
    table = make_table("Criterion", "Status", "Explanation")
    for criterion in verdict["criteria"]:
        style = _CRITERION_STYLES[criterion["status"]]
        table.add_row(
            Text(criterion["name"], no_wrap=True),
            Text(criterion["status"], style=style),
            Text(criterion["explanation"]),
        )
    summary = verdict.get("summary")
    return Group(headline, *([Text(summary)] if summary else []), table)


def comparison_view(comparison: Json) -> RenderableType:
    """The jobs by rank, then the recommendation."""
    entries = {entry["job"]["id"]: entry for entry in comparison["jobs"]}
    ranked = [entries.pop(job_id) for job_id in comparison["ranking"] if job_id in entries]
    table = make_table("Option", "Job", ">Accuracy", ">Recall", ">IoU", ">Criteria", "Verdict")
    for entry in [*ranked, *entries.values()]:
        table.add_row(*_comparison_cells(entry))
    return Group(table, _recommendation_text(comparison), *_difference_lines(comparison))


def welcome_text(url: str, *, data_dir: Path, num_workers: int, needs_token: bool) -> Text:
    """The addresses of a service that has just started, and how to post a job to it."""
    post = """curl -H 'Content-Type: application/json' -d '{"option":"b","quick_test":true}'"""
    token = ["Token     required; both commands read LOSSLAB_API_TOKEN"] if needs_token else []
    post += ' -H "Authorization: Bearer $LOSSLAB_API_TOKEN"' if needs_token else ""
    set_url = "" if url == "http://127.0.0.1:8000" else f"LOSSLAB_URL={url} "
    lines = [
        f"Losslab   {url}  with {num_workers} worker{'' if num_workers == 1 else 's'}",
        f"API docs  {url}/docs",
        f"Data      {data_dir.absolute()}",
        *token,
        f"Try       {set_url}losslab submit --option b --quick-test --wait",
        f"or        {post} {url}/jobs",
        "Ctrl-C stops everything.",
    ]
    return Text("\n".join(lines))


def _comparison_cells(entry: Json) -> list[Text]:
    job, verdict = entry["job"], entry["verdict"]
    passed = [item["name"] for item in verdict["criteria"] if item["status"] == "passed"]
    return [
        name_cell(job["option"]),
        Text(job["id"]),
        Text(format_share(job["train_pixel_accuracy"])),
        Text(format_decimals(job["val_foreground_recall"])),
        Text(format_decimals(job["val_foreground_iou"])),
        Text(f"{len(passed)} of {len(verdict['criteria'])}"),
        Text(verdict["diagnosis"], style=_OUTCOME_STYLES.get(verdict["outcome"], "")),
    ]


def _recommendation_text(comparison: Json) -> Text:
    recommendation = comparison["recommendation"]
    if recommendation is None:
        return Text.assemble(
            ("No option can be recommended: ", "bold yellow"), str(comparison.get("reason") or "")
        )
    is_decided = recommendation["state"] == "decided"
    word = "Recommended" if is_decided else "Best so far"
    return Text.assemble(
        (f"{word}: option {recommendation['option']}", "bold green"),
        f" (job {recommendation['job_id']}). {recommendation['reason']}",
    )


def _difference_lines(comparison: Json) -> list[Text]:
    """A warning if the jobs differ in more than their loss."""
    others = [key for key in comparison["differences"] if key not in _LOSS_SETTINGS]
    if not others:
        return []
    return [Text(f"They also differ in {', '.join(others)}.", style="yellow")]


def _verdict_text(verdict: Json) -> Text:
    style = _OUTCOME_STYLES.get(verdict["outcome"], "")
    return Text.assemble((verdict["outcome"], style), f", {verdict['diagnosis']}")


def _status_text(job: Json) -> Text:
    text = Text(job["status"], style=STATUS_STYLES.get(job["status"], ""))
    if job["status"] == "running" and job["cancel_requested_at"]:
        return text.append(", is being cancelled")
    if job["status"] == "running" and job["pause_requested_at"]:
        return text.append(", is being paused")
    return text


def _describe_settings(settings: Json) -> str:
    return "  ".join(f"{key}={value}" for key, value in settings.items())


def _describe_numbers(job: Json, *, with_status: bool = True) -> str:
    if with_status and job["status"] not in ("running", "succeeded"):
        return str(job["status"])
    if with_status and not job["epochs_completed"] and job["phase"] == "loading_data":
        return "loading data"
    return "  ".join(
        [
            f"epoch {_describe_epochs(job)}",
            f"loss {format_decimals(job['train_loss'], digits=4)}",
            f"accuracy {format_share(job['train_pixel_accuracy'])}",
            f"recall {format_decimals(job['val_foreground_recall'])}",
        ]
    )


def _describe_epochs(job: Json) -> str:
    return f"{job['epochs_completed']}/{job['num_epochs']}"


def _describe_time_left(job: Json) -> str:
    return describe_seconds_left(job.get("seconds_left")) if job["status"] == "running" else ""


def name_cell(name: str) -> Text:
    """One line, which is shortened rather than another column."""
    return Text(name, no_wrap=True, overflow="ellipsis")


def make_table(*headings: str) -> Table:
    """An empty table. A heading that begins with `>` is a column of numbers."""
    table = Table(header_style="bold", box=SIMPLE_HEAD)
    for heading in headings:
        is_number = heading.startswith(">")
        # A wrapped number or id is hard to read; wrapped words are not.
        table.add_column(
            heading.removeprefix(">"),
            justify="right" if is_number else "left",
            no_wrap=heading not in _WRAPPED,
            overflow="fold" if heading in _WRAPPED else "ellipsis",
        )
    return table
