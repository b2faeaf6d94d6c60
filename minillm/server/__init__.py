"""An HTTP server that speaks OpenAI's protocol: many clients, one engine, and a budget that none of them can exceed."""
