"""Work that takes longer than a request and outlives processes: a durable table of jobs, for servers and workers."""

from promptmux_server.jobs.job import ENDED, Job, JobEvent, State
from promptmux_server.jobs.table import FILE, Claim, JobTable

__all__ = ["ENDED", "FILE", "Claim", "Job", "JobEvent", "JobTable", "State"]
