"""What all experiments share: a console, errors told in a line, and a small run to look into where none is given."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

console = Console()


def closing(main: Callable[[], None]) -> None:
    """Runs `main`; what the user can mend is told in a line."""
    try:
        main()
    except (ValueError, FloatingPointError, OSError, KeyError, subprocess.CalledProcessError) as error:
        console.print(f"[bold red]error:[/] {error}", highlight=False)
        sys.exit(2)


def small_run(folder: Path, tried: Sequence[str]) -> None:
    """A run of incremental.py with pools of these methods, a minute or two each; nothing where it is finished."""
    size = ["--tasks", "5", "--classes", "6", "--images", "50", "--epochs", "4"]
    script, place = Path(__file__).with_name("incremental.py"), ["--runs", str(folder.parent), "--name", folder.name]
    subprocess.run([sys.executable, str(script), *size, "--methods", *tried, *place], check=True)
