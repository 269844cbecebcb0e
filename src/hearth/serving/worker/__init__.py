"""The worker (`python -m hearth.serving.worker`): one model, one engine process, one HTTP server.

Contract: whatever happens to the engine, every open request gets an answer or an error at once; then the
worker exits with a code other than 0 and whoever supervises it starts another.
"""
