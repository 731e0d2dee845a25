"""The `surgery` command: parses, calls one function of the library, prints what it returned."""
