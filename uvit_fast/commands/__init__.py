"""One file a command: HELP, `arguments(parser)`, `run(args)`. Heavy imports are inside `run`."""
