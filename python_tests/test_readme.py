"""The README does what it says: its sample runs as printed, its links lead somewhere, its commands exist."""

import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from manpp_kernels.cli import COMMANDS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_sample_runs_as_printed(tmp_path: Path) -> None:
    (sample,) = blocks("python")
    done = subprocess.run([sys.executable, "-c", sample], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\[(\d+\.\d+, ){3}\d+\.\d+\]\n", done.stdout)


PRINTED = {"models.md": "4 local blocks\n", "operators.md": "", "training.md": "2 epochs\n"}


@pytest.mark.parametrize("page", PRINTED)
def test_the_samples_of_a_page_run_as_printed(page: str, tmp_path: Path) -> None:
    samples = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), flags=re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(samples)], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, PRINTED[page]), done.stderr


def test_the_commands_exist() -> None:
    words = [shlex.split(line, comments=True) for block in blocks("sh") for line in block.splitlines()]
    asked = [w for w in words if w]
    makefile = (ROOT / "Makefile").read_text()
    for command in asked:
        if command[0] == "make":
            assert re.search(rf"^{command[1]}:", makefile, flags=re.MULTILINE), command
        elif command[0] == "manpp":
            assert command[1] in COMMANDS
        else:
            assert command[:2] == ["pip", "install"]
    assert {"make", "manpp", "pip"} == {command[0] for command in asked}


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    seen: Counter[str] = Counter()
    found = set()
    for heading in re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.add(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return found


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_lead_somewhere(page: str) -> None:
    here = ROOT / page
    for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", here.read_text()):
        if not target.startswith("http"):
            there = here.parent / target if target else here
            assert there.exists(), target
            assert not anchor or anchor in anchors(there), anchor
