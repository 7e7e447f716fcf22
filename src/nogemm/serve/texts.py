"""`/v1/embeddings` and `/v1/rerank`."""

from __future__ import annotations

import base64
import uuid
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from nogemm.serve.answers import body_of, json_response, within
from nogemm.serve.errors import invalid
from nogemm.serve.requests import EmbedRequest, RerankRequest, embed_request, rerank_request
from nogemm.serve.service import Service, count


class Texts:
    """The paths of encoders and rerankers."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def embeddings(self, request: Request) -> Response:
        """Answer as OpenAI's embeddings do; vectors have length one."""
        options = self.service.options
        asked = embed_request(await body_of(request, options), self.service.name, options.request_texts)
        return json_response(await within(request, options, self._embed(asked)))

    async def rerank(self, request: Request) -> Response:
        """Answer as Jina's, Cohere's and vLLM's rerank do: the best documents first, ties in their order."""
        options = self.service.options
        asked = rerank_request(await body_of(request, options), self.service.name, options.request_texts)
        return json_response(await within(request, options, self._rerank(asked)))

    async def _embed(self, asked: EmbedRequest) -> dict[str, Any]:
        service, facts = self.service, self.service.pool.facts
        if asked.dimensions not in (None, facts["width"]):
            raise invalid(f"dimensions must be {facts['width']}, what this model has, or left out.", "dimensions")
        rows = await service.tokens.texts(asked.texts, None, facts["max_length"], cut=asked.cut, field="input")
        found = await service.rows(rows)
        tokens = count(rows)
        return {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": _base64(row) if asked.base64 else row}
                for index, row in enumerate(found)
            ],
            "model": service.name,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }

    async def _rerank(self, asked: RerankRequest) -> dict[str, Any]:
        service, documents = self.service, asked.documents
        queries, longest = [asked.query] * len(documents), service.pool.facts["max_length"]
        rows = await service.tokens.texts(queries, documents, longest, cut=asked.cut, field="documents")
        scores = np.array([row[0] for row in await service.rows(rows)])
        best = np.argsort(-scores, kind="stable")[: asked.top].tolist()
        results = [
            {"index": index, "relevance_score": float(scores[index])}
            | ({"document": {"text": documents[index]}} if asked.texts else {})
            for index in best
        ]
        tokens = count(rows)
        return {
            "id": f"rerank-{uuid.uuid4().hex}",
            "model": service.name,
            "results": results,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }


def _base64(row: Any) -> str:
    """Return float32 numbers, the lowest byte first, as OpenAI's clients read them."""
    return base64.b64encode(np.ascontiguousarray(row, "<f4").tobytes()).decode()
