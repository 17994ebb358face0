"""The jobs that `launch` starts, each a function of (config, workdir); callable from a notebook."""
