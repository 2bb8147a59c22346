"""How many bytes of uploads a site may hold on the server's disk, unfinished and recorded ones together."""

from pathlib import Path

from fsllm_common.errors import Unavailable


class DiskQuota:
    """Knows an upper bound for each site, and looks at the disk only when that bound is passed."""

    def __init__(self, spools: Path, limit: int) -> None:
        """Forget nothing across restarts: the folder ``spools/<run>/<round>/<site>/`` is the truth.

        Args:
            spools: The folder of all uploads.
            limit: Bytes a site.

        """
        self._spools = spools
        self._limit = limit
        self._most: dict[str, int] = {}

    def demand(self, member: str, size: int) -> None:
        """Make room for an upload of ``size`` bytes in the site's account.

        Raises:
            Unavailable: QUOTA_EXCEEDED.

        """
        most = self._most.get(member, self._limit) + size
        if most > self._limit:
            held = sum(path.stat().st_size for path in self._spools.glob(f"*/*/{member}/*") if path.is_file())
            most = held + size
            if most > self._limit:
                message = (
                    f"{member} holds {held} bytes on the server's disk; {size} more would pass the {self._limit} "
                    "allowed (--member-disk-bytes)"
                )
                raise Unavailable("QUOTA_EXCEEDED", message, retry_after=60.0)
        self._most[member] = most
