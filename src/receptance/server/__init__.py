"""An HTTP server that speaks OpenAI's API, and keeps conversations as states. Needs the extra `serve`."""
