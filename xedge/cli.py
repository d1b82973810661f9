"""The command line: parse, call, print. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import sys
from typing import Any

import click

from xedge import __version__
from xedge.cli_compress import compress, report
from xedge.cli_devices import bench, devices, gate, lpirc
from xedge.cli_tools import audit, convert, diagnose, doctor, lint, list_, unpack, upscale
from xedge.errors import XedgeError


class Group(click.Group):
    """Every error of ours is one line on stderr and its own exit code."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command line."""
        if not kwargs.get("standalone_mode", True):
            return super().main(*args, **kwargs)
        try:
            code = super().main(*args, **{**kwargs, "standalone_mode": False})
        except XedgeError as e:
            click.echo(f"xedge: {e}", err=True)
            sys.exit(e.exit_code)
        except click.exceptions.NoArgsIsHelpError as e:
            e.show()
            sys.exit(e.exit_code)
        except click.ClickException as e:  # click's own text takes four lines
            click.echo(f"xedge: {' '.join(e.format_message().split())}", err=True)
            sys.exit(e.exit_code)
        except (click.Abort, KeyboardInterrupt):  # click turns Ctrl-C into Abort
            click.echo("xedge: stopped; run the same command again to go on", err=True)
            sys.exit(130)
        except OSError as e:
            where = f"{e.filename}: " if e.filename else ""
            click.echo(f"xedge: {where}{e.strerror or e}; check that path and its disk", err=True)
            sys.exit(2)
        sys.exit(code)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="xedge")
def main() -> None:
    """Make a trained CNN small and fast on a real edge device, with proof.

    \b
    Exit codes: 0 budget met, 1 internal, 2 bad input, 3 latency missed, 4 accuracy missed,
    5 device absent or lost, 6 graph not supported, 7 inconclusive measurement.
    """


for _command in (
    compress, bench, devices, lpirc, gate, report, audit, convert, diagnose, unpack, upscale, list_, doctor, lint,
):  # fmt: skip
    main.add_command(_command)


if __name__ == "__main__":
    main()
