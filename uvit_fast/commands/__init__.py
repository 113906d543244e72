"""One file per command: HELP, `arguments(parser)`, `run(args)`. Heavy imports are inside `run`."""
