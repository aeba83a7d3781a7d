"""The official Python SDK's exec and cp helpers against the running instance `box`.

STEAD_BASE_URL and STEAD_API_KEY; the argument is a scratch directory. Plain asserts.
"""

import asyncio
import os
import sys
from pathlib import Path

from hypeman import Hypeman
from hypeman.lib import CopyProtocolError, cp_from_instance, cp_to_instance, exec, exec_async

client = Hypeman(base_url=os.environ["STEAD_BASE_URL"], api_key=os.environ["STEAD_API_KEY"])
scratch = Path(sys.argv[1])

done = exec(client, "box", ["sh", "-c", "echo out; echo err >&2; exit 3"])
assert (done.output, done.exit_code) == (b"out\nerr\n", 3), done
done = exec(client, "box", ["head", "-c", "70000"], stdin=bytes(70000), cwd="/tmp", env={"A": "b"}, timeout=30)
assert (done.output, done.exit_code) == (bytes(70000), 0)
done = exec(client, "box", ["stty", "size"], tty=True, rows=10, cols=20, wait_for_agent=5)
assert (done.output, done.exit_code) == (b"10 20\r\n", 0), done
done = exec(client, "box", ["/no/such/program"])
assert done.exit_code == 127 and b"command not found" in done.output, done


async def at_once():
    return await asyncio.gather(*(exec_async(client, "box", ["echo", str(n)]) for n in range(5)))


assert [done.output for done in asyncio.run(at_once())] == [f"{n}\n".encode() for n in range(5)]

tree = scratch / "tree"
(tree / "sub").mkdir(parents=True)
(tree / "a").write_bytes(os.urandom(300_000))
(tree / "sub" / "b").write_text("two")
(tree / "empty").touch()
(tree / "a").chmod(0o750)
cp_to_instance(client, "box", tree, "/tmp/up")
done = exec(client, "box", ["sh", "-c", "cd /tmp/up && find . -type f | sort | xargs stat -c '%n %s %a'"])
assert done.output == b"./a 300000 750\n./empty 0 644\n./sub/b 3 644\n", done.output
exec(client, "box", ["ln", "-s", "sub/b", "/tmp/up/link"])
cp_from_instance(client, "box", "/tmp/up", scratch / "down")
down = scratch / "down"
assert (down / "a").read_bytes() == (tree / "a").read_bytes()
assert (down / "a").stat().st_mode & 0o777 == 0o750
assert (down / "sub" / "b").read_text() == "two" and os.readlink(down / "link") == "sub/b"
cp_from_instance(client, "box", "/tmp/up/sub/b", scratch / "single")
assert (scratch / "single" / "b").read_text() == "two"
try:
    cp_from_instance(client, "box", "/no/such/file", scratch / "none")
    raise AssertionError("a file that is not there was copied")
except CopyProtocolError as error:
    assert "No such file" in str(error), error
info = client.instances.stat("box", path="/tmp/up/a")
assert info.exists and info.is_file and info.size == 300_000, info
print("agent: everything passed")
