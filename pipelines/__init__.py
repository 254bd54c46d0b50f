"""Pure computation: a frame in, a result out. No sockets, threads, clocks or global state."""
