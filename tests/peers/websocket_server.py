"""A WebSocket server that first says who the client is, as nginx told it, and then echoes."""
import asyncio
import sys

import websockets


async def serve(websocket):
    await websocket.send(websocket.request_headers["X-Forwarded-For"])
    async for message in websocket:
        await websocket.send(message)


async def main():
    async with websockets.serve(serve, "127.0.0.1", int(sys.argv[1])):
        print("listening", flush=True)
        await asyncio.Future()


asyncio.run(main())
