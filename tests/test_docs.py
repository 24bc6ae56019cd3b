"""The documentation says what the source does, and leads nowhere that is not there."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from server.judging.criteria import CriterionName, Thresholds
from server.models.epochs import EpochMetrics
from server.settings import Settings

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
GENERATED = (
    ".env.example",
    "docs/reference/command-line.md",
    "docs/reference/http-api.md",
    "docs/reference/settings.md",
)
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
    *sorted(DOCS.rglob("*.md")),
]
MAX_README_LINES = 140
#: A page or a style sheet that has something loaded from another site.
LOAD = re.compile(r"<(script|img|iframe|link)\b[^>]*\s(src|href)=[\"']?(https?:)?//")
STYLE_LOAD = re.compile(r"(url\(|@import)[\"' ]*(https?:)?//")

#: What would change a page that depended on it.
ODD_ENVIRONMENT = {
    "COLUMNS": "40",
    "FORCE_COLOR": "1",
    "TERMINAL_WIDTH": "40",
    "LOSSLAB_API_TOKEN": "a-long-and-secret-token",
    "LOSSLAB_DATA_DIR": "elsewhere",
    "LOSSLAB_NUM_WORKERS": "7",
    "LOSSLAB_PORT": "9",
}


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def read_without_blocks(path: Path) -> str:
    """A page without its blocks of code, in which # is no heading."""
    return re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)


def list_anchors(path: Path) -> list[str]:
    """The anchors of a page's headings, as code hosts and MkDocs both make them."""
    headings = re.findall(r"^#+ (.+)$", read_without_blocks(path), flags=re.M)
    kept = [re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings]
    return [re.sub(r"\s+", "-", heading) for heading in kept]


def list_links(path: Path) -> Iterator[str]:
    """The targets of a page's links and images that are no web addresses."""
    prose = re.sub(r"`[^`\n]+`", "", read_without_blocks(path))
    for target in re.findall(r"\]\(([^()\s]+)\)", prose):
        if not re.match(r"[a-z]+:", target):
            yield target


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the generator gives in an environment that should not matter."""
    folder = tmp_path_factory.mktemp("generated")
    subprocess.run(
        [sys.executable, str(DOCS / "generate.py"), str(folder)],
        cwd=folder,
        env=os.environ | ODD_ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documentation as MkDocs builds it, with every warning an error."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", GENERATED)
def test_generated_page_is_what_the_source_gives(name: str, generated: Path) -> None:
    assert read(name) == (generated / name).read_text(encoding="utf-8"), "run `make docs`"


def test_generator_writes_nothing_else(generated: Path) -> None:
    paths = [path for path in generated.rglob("*") if path.is_file()]
    assert sorted(str(path.relative_to(generated)) for path in paths) == sorted(GENERATED)


@pytest.mark.parametrize("name", [".env.example", "docs/reference/settings.md"])
def test_every_setting_is_listed(name: str) -> None:
    text = read(name)
    variables = [f"LOSSLAB_{field.upper()}" for field in Settings.model_fields]
    assert [variable for variable in variables if variable not in text] == []


def test_every_setting_is_described() -> None:
    fields = Settings.model_fields.items()
    assert [name for name, field in fields if not field.description] == []


def test_example_environment_sets_nothing() -> None:
    lines = read(".env.example").splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == []


def test_every_metric_has_its_formula_on_the_metrics_page() -> None:
    text = read("docs/reference/metrics.md")
    assert [name for name in EpochMetrics.model_fields if f"`{name}`" not in text] == []


@pytest.mark.parametrize("name", [*CriterionName, *Thresholds.model_fields])
def test_every_criterion_and_threshold_is_on_the_criteria_page(name: str) -> None:
    assert f"`{name}`" in read("docs/reference/criteria.md")


@pytest.mark.parametrize("name", CriterionName)
def test_every_criterion_has_a_formula(name: str) -> None:
    assert f"### {name}\n\n```text\n" in read("docs/reference/criteria.md")


@pytest.mark.parametrize(
    ("name", "default"), [(n, f.default) for n, f in Thresholds.model_fields.items()]
)
def test_documented_thresholds_are_the_defaults(name: str, default: float) -> None:
    match = re.search(rf"^\| `{name}` \| ([0-9.]+)", read("docs/reference/criteria.md"), flags=re.M)
    assert match is not None
    assert float(match[1]) == default


def list_shown_messages() -> list[str]:
    """The messages on the page for troubleshooting: code in the first column of its tables."""
    rows = re.findall(r"^\| (`.*?) \| ", read("docs/how-to/troubleshooting.md"), flags=re.M)
    return [message for row in rows for message in re.findall(r"`([^`]+)`", row)]


@cache
def read_source_texts() -> str:
    """All texts in the source, those with values in them in pieces."""
    texts = []
    for path in sorted([*ROOT.glob("server/**/*.py"), *ROOT.glob("worker/**/*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


@pytest.mark.parametrize("message", list_shown_messages())
def test_messages_of_troubleshooting_are_those_of_the_source(message: str) -> None:
    """Values differ: an ellipsis, words in capitals and numbers stand for them."""
    pieces = re.split(r"…|\b[A-Z][A-Z_]*\b|\b[0-9]+\b", message)
    long_pieces = [piece.strip(" :;,()/") for piece in pieces if len(piece.strip(" :;,()/")) > 10]
    assert [piece for piece in long_pieces if not is_in_source(piece)] == []


def is_in_source(piece: str) -> bool:
    """Whether it is a text of the source, or made of several one after the other."""
    words = piece.split(" ")
    for number in range(len(words), 0, -1):
        if " ".join(words[:number]).strip(" :;,()/") in read_source_texts():
            return number == len(words) or is_in_source(" ".join(words[number:]))
    return False


def test_readme_is_short() -> None:
    assert len(read("README.md").splitlines()) <= MAX_README_LINES


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading(path: Path) -> None:
    broken = []
    for link in list_links(path):
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        if not target.exists() or (anchor and anchor not in list_anchors(target)):
            broken.append(link)
    assert broken == []


def test_pages_have_links_to_check() -> None:
    num_links = sum(len(list(list_links(path))) for path in PAGES)
    assert num_links > 100


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_headings_of_a_page_have_anchors_of_their_own(path: Path) -> None:
    anchors = list_anchors(path)
    assert len(set(anchors)) == len(anchors)


def test_site_builds_without_a_warning(site: Path) -> None:
    built = {path.relative_to(site).with_suffix(".md") for path in site.rglob("*.html")}
    assert {path.relative_to(DOCS) for path in DOCS.rglob("*.md")} <= built


def test_site_loads_nothing_from_elsewhere(site: Path) -> None:
    assert [str(path) for path in site.rglob("*.html") if LOAD.search(path.read_text())] == []
    styles = site.rglob("*.css")
    assert [str(path) for path in styles if STYLE_LOAD.search(path.read_text())] == []


def test_site_has_no_script_of_the_repository(site: Path) -> None:
    assert list(site.rglob("*.py")) == []


@pytest.mark.parametrize("name", ["evidence", "thirty_epochs"])
def test_shown_evidence_is_the_measured_one(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import evidence  # noqa: PLC0415 - found by the line before

    assert name in evidence.SHOWN_RESULTS
    results, page = json.loads(read(f"benchmarks/results/{name}.json")), read("docs/results.md")
    shown = evidence.format_page(results)
    assert f"<!-- {name} -->\n\n{shown}\n\n<!-- /{name} -->" in page
    for study in results["studies"]:
        judged = [each["num_judged"] for arm in study["arms"] for each in arm["verdicts"].values()]
        assert (study["status"], set(judged)) == ("succeeded", {len(study["seeds"])})


def test_shown_attacks_are_the_measured_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import attacks  # noqa: PLC0415 - found by the line before

    rows = json.loads(read("benchmarks/results/attacks.json"))["attacks"]
    shown = f"<!-- attacks -->\n\n{attacks.format_table(rows)}\n\n<!-- /attacks -->"
    assert shown in read("docs/security.md")
    assert {row["attack"] for row in rows} == set(attacks.ATTACKS)
    for row in rows:
        assert row["health_seconds_99th"] < attacks.MAX_HEALTH_SECONDS
        assert row["memory_growth_mib"] < attacks.MAX_GROWTH_MIB


def test_shown_study_is_the_measured_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import study  # noqa: PLC0415 - found by the line before

    results, page = json.loads(read("benchmarks/results/study.json")), read("README.md")
    assert f"<!-- study -->\n\n{study.format_table(results)}\n\n<!-- /study -->" in page
    assert results["status"] == "succeeded"
    assert all(arm["num_judged"] == len(results["seeds"]) for arm in results["arms"])


def test_shown_errors_of_the_decision_are_the_measured_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import decision  # noqa: PLC0415 - found by the line before

    results, page = json.loads(read("benchmarks/results/decision.json")), read("docs/deciding.md")
    for name, table in decision.format_tables(results).items():
        assert f"<!-- {name} -->\n\n{table}\n\n<!-- /{name} -->" in page
    assert max(row["best_ruled_out"] for row in results["errors"]) <= decision.MAX_ERROR


def test_measuring_again_rewrites_the_shown_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.machine import show  # noqa: PLC0415 - found by the line before

    page = tmp_path / "page.md"
    page.write_text(read("docs/results.md"))
    show("| new |", name="evidence", page=page)
    show("| newer |", name="evidence", page=page)
    assert "<!-- evidence -->\n\n| newer |\n\n<!-- /evidence -->" in page.read_text()
    assert page.read_text().startswith("# Results")
    assert "## Speed" in page.read_text()


def test_compose_files_pass_every_setting_that_a_container_can_have() -> None:
    described = (ROOT / "docker" / "compose.base.yml").read_text()
    # Set in the images, or of a package that they do not have.
    fixed = {"data_dir", "host", "port", "wandb_project"}
    names = {f"LOSSLAB_{name.upper()}:" for name in Settings.model_fields if name not in fixed}
    assert [name for name in sorted(names) if name not in described] == []
