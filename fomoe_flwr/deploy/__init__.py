"""What `fomoe server`, `fomoe site` and `fomoe submit` do: Flower's own programs, started and watched."""
