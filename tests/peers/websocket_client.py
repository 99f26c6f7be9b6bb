"""A WebSocket client: says its own address and the one the server names, then echoes one message for each line it reads."""
import asyncio
import sys

import websockets


async def main():
    async with websockets.connect(sys.argv[1], ping_interval=0.2, ping_timeout=5) as websocket:
        host, port = websocket.local_address[:2]
        print("local", host, port, flush=True)
        print("named", await websocket.recv(), flush=True)
        for size in (1, 125, 126, 65536, 1000000):
            message = "x" * size
            await websocket.send(message)
            assert await websocket.recv() == message
            print("echoed", size, flush=True)
        # Several pings go both ways, then the connection is still good for a message.
        for _ in range(5):
            await (await websocket.ping())
            await asyncio.sleep(0.3)
        await websocket.send("still here")
        print("echoed", await websocket.recv(), flush=True)


asyncio.run(main())
