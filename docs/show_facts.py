"""Run the test of each property in the table of docs/comparison.md.

python docs/show_facts.py            # needs what the tests need: pip install -e '.[test]'
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROW = re.compile(r"^\| (?P<fact>[^|]+) \|(?:[^|]*\|){4} `(?P<file>tests/\w+\.py)::(?P<test>\w+)` \|$", re.MULTILINE)


def facts(text: str) -> list[tuple[str, str]]:
    """Return the properties of the table, each with its test."""
    return [(m["fact"], f"{m['file']}::{m['test']}") for m in ROW.finditer(text)]


def main() -> int:
    """Print one line per property; return 1 if the test of any of them fails."""
    failed = 0
    for fact, test in facts((ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")):
        command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "slow or not slow", test]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        failed += done.returncode != 0
        print(f"{'shown' if done.returncode == 0 else 'NOT SHOWN':<10} {fact}\n           {test}", flush=True)
        if done.returncode:
            print(done.stdout[-2000:] + done.stderr[-2000:])
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
