"""Entry point of `revivemoe`. It imports next to nothing, so that Ctrl-C has a meaning at once."""

from revivemoe.cli.at_once import end_at_once


def main() -> None:
    """Run the command line.

    Loading libraries takes seconds. Until a command has something to clean up, Ctrl-C ends the
    process as it ends any other; as an exception it would come out of whatever is being imported.
    """
    end_at_once()
    from revivemoe.cli.app import run

    run()


if __name__ == "__main__":
    main()
