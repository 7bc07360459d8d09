"""Work that takes longer than a request and outlives processes: a durable table of jobs, for servers and workers."""

from promptmux_server.jobs.job import Job, JobEvent, State
from promptmux_server.jobs.table import Claim, JobTable

__all__ = ["Claim", "Job", "JobEvent", "JobTable", "State"]
