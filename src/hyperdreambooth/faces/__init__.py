"""Photos in: from files to upright RGB pictures, people, pixels and cached latents."""
