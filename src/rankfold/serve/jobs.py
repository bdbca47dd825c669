"""Fine-tuning jobs over HTTP, in the words of OpenAI's API: seen and cancelled; they begin with the server."""

from typing import Annotated, Any

from fastapi import FastAPI, Query

from rankfold.serve.engine import Engine
from rankfold.serve.errors import ApiError
from rankfold.serve.finetune import Job

Limit = Annotated[int, Query(ge=1, le=100)]


def add_jobs(app: FastAPI, engine: Engine) -> None:
    """`/v1/fine_tuning/jobs` and what is under it, for the jobs that the engine trains or has trained."""

    def found(job: str) -> Job:
        for one in engine.jobs:
            if one.id == job:
                return one
        raise ApiError(404, "there is no such job", param="job", code="not_found")

    @app.get("/v1/fine_tuning/jobs")
    def jobs(after: str | None = None, limit: Limit = 20) -> dict[str, Any]:
        """The fine-tuning jobs, the newest first."""
        return _page([job.describe() for job in reversed(engine.jobs)], after, limit)

    @app.get("/v1/fine_tuning/jobs/{job}")
    def one(job: str) -> dict[str, Any]:
        """A job, with its step and last losses."""
        return found(job).describe()

    @app.get("/v1/fine_tuning/jobs/{job}/events")
    def events(job: str, after: str | None = None, limit: Limit = 20) -> dict[str, Any]:
        """What a job logged, the newest first."""
        return _page(found(job).events(), after, limit)

    @app.post("/v1/fine_tuning/jobs/{job}/cancel")
    def cancel(job: str) -> dict[str, Any]:
        """Give a job up for good. What it has trained so far stays in its folder."""
        asked = found(job)
        if asked.ended:
            raise ApiError(400, f"the job has {asked.status} already", param="job", code="job_ended")
        asked.cancel()
        return asked.describe()


def _page(items: list[dict[str, Any]], after: str | None, limit: int) -> dict[str, Any]:
    """So many items behind the one whose id is `after`."""
    ids = [item["id"] for item in items]
    if after is not None and after not in ids:
        raise ApiError(400, "there is no such item", param="after", code="not_found")
    begin = 0 if after is None else ids.index(after) + 1
    return {"object": "list", "data": items[begin : begin + limit], "has_more": len(items) > begin + limit}
