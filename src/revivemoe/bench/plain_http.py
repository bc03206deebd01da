"""`httpx` for servers on this host. Left to itself it reads the system's certificates for each
client it makes, also for plain HTTP: 30 ms of processor time.
"""

from functools import partial

import httpx

get = partial(httpx.get, verify=False)
post = partial(httpx.post, verify=False)
request = partial(httpx.request, verify=False)
stream = partial(httpx.stream, verify=False)
client = partial(httpx.Client, verify=False)
async_client = partial(httpx.AsyncClient, verify=False)
