"""The OpenAPI description, derived from the schema."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from admtrt import __version__
from admtrt.serve.schema import ImageRequest, InversionAsked, SampleRequest

if TYPE_CHECKING:
    from pydantic import BaseModel

_COMMON = {
    "400": "The model cannot do this",
    "401": "No token, or an unknown one",
    "404": "No such model",
    "408": "The body came too slowly",
    "413": "The body is too large",
    "415": "The body is not application/json",
    "421": "The server is not called so",
    "422": "A field is unknown, missing or of another type",
    "429": "Too much work is waiting; see Retry-After",
    "500": "A fault of the server",
    "503": "Not ready, or draining; see Retry-After",
    "504": "The request's time was over",
}


def description() -> dict[str, Any]:
    """Make the description, OpenAPI 3.1."""
    schemas: dict[str, Any] = {}

    def body(model: type[BaseModel]) -> dict[str, Any]:
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(schema.pop("$defs", {}))
        schemas[model.__name__] = schema
        reference = {"$ref": f"#/components/schemas/{model.__name__}"}
        return {"required": True, "content": {"application/json": {"schema": reference}}}

    def answers(status: str, text: str, *types: str, failures: bool = True) -> dict[str, Any]:
        good = {"description": text, "content": {one: {} for one in types}}
        return {status: good} | {code: {"description": why} for code, why in _COMMON.items() if failures}

    job = [{"name": "job", "in": "path", "required": True, "schema": {"type": "string"}}]
    drawn = ("application/json", "application/x-npz")
    jobs = {
        "get": {"summary": "How far a job is", "parameters": job,
                "responses": answers("200", "Its state", "application/json")},
        "delete": {"summary": "Give a job up and forget it", "parameters": job,
                   "responses": answers("204", "Forgotten")},
    }  # fmt: skip
    paths = {
        "/v1/samples": {"post": {"summary": "Draw samples", "requestBody": body(SampleRequest),
                                 "responses": answers("200", "The images", *drawn, "text/event-stream")}},
        "/v1/inversions": {"post": {"summary": "Invert images by DDIM", "requestBody": body(InversionAsked),
                                    "responses": answers("200", "The latents", *drawn)}},
        "/v1/jobs": {"post": {"summary": "Draw samples later", "requestBody": body(SampleRequest),
                              "responses": answers("202", "Taken", "application/json")}},
        "/v1/jobs/{job}": jobs,
        "/v1/jobs/{job}/result": {"get": {"summary": "What a job drew", "parameters": job,
                                          "responses": answers("200", "The images", *drawn)}},
        "/v1/models": {"get": {"summary": "The models",
                               "responses": answers("200", "All", "application/json")}},
        "/v1/models/{name}": {"get": {
            "summary": "One model",
            "parameters": [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}],
            "responses": answers("200", "The model", "application/json")}},
        "/v1/images/generations": {"post": {
            "summary": "OpenAI's interface", "requestBody": body(ImageRequest),
            "responses": answers("200", "The images", "application/json", "text/event-stream")}},
        "/health/live": {"get": {"summary": "Whether no engine has failed",
                                 "responses": answers("200", "Live", "application/json", failures=False)}},
        "/health/ready": {"get": {"summary": "Whether requests are taken",
                                  "responses": answers("200", "Ready", "application/json", failures=False)}},
        "/metrics": {"get": {"summary": "Numbers for Prometheus",
                             "responses": answers("200", "Text", "text/plain", failures=False)}},
    }  # fmt: skip
    security = {"token": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "admtrt", "version": __version__},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": security},
        "security": [{}, {"token": []}],
    }
