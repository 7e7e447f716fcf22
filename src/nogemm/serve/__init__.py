"""A model behind HTTP: embeddings, reranking scores or completions, by OpenAI's paths.

Reading order: `options` (what is served), `app` (who may ask, and by which path), `texts` and `completions` (the
answers), `waiting` and `pool` (which texts go together, and to which worker), `worker`, `text_engines` and
`decoder_engine` (what a worker computes), `server` (the socket).
"""

from nogemm.serve.app import ServeApp, create_app
from nogemm.serve.options import ServeOptions
from nogemm.serve.server import run_server

__all__ = ["ServeApp", "ServeOptions", "create_app", "run_server"]
