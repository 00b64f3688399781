"""The `metalstep` command. One file per subcommand; `main` finds those of other packages through an entry-point group."""
