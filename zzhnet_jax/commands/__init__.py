"""The subcommands of `zzhnet`, one module each, with `main(argv) -> int`."""
