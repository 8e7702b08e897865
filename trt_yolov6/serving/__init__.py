"""Model repositories for servers, and what runs inside Triton."""
