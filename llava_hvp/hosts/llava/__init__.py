"""Where pruning plugs into LLaVA. The only package that imports `llava`."""

from llava_hvp.hosts.llava.compat import check_versions

check_versions()
