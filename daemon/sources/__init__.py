"""Where frames come from: one module a wire format, its simulator beside it."""
