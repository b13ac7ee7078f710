"""Ranks that are threads of one process, as the audit has them; errors are returned, for tests that expect one."""

from pgolf.audit import ranks
from pgolf.errors import PgolfError


def on_ranks(world, work):
    """[work(dist)] of all ranks; a PgolfError is returned, not raised."""

    def caught(dist):
        try:
            return work(dist)
        except PgolfError as err:
            return err

    return ranks.on_ranks(world, caught)
