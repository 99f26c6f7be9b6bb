"""Sends a UDP datagram to a port of ::1 that is longer than IPv6 can say without an option (RFC 2675): PORT BYTES.

As a network card with checksum offload delivers it: the kernel sums what it must cut in 16 bits of length, and drops it.
"""

import socket
import struct
import sys

SOL_PACKET, PACKET_VNET_HDR = 263, 15
NEEDS_CSUM = 1
ETH_P_IPV6 = 0x86DD
UDP = 17

port, length = int(sys.argv[1]), int(sys.argv[2])
loopback = socket.inet_pton(socket.AF_INET6, "::1")
ethernet = bytes(12) + struct.pack("!H", ETH_P_IPV6)
# No length here: it stands in the hop-by-hop option 0xc2, and that of UDP is 0, too.
ipv6 = struct.pack("!IHBB", 6 << 28, 0, 0, 64) + loopback + loopback
hop_by_hop = struct.pack("!BBBBI", UDP, 0, 0xC2, 4, 8 + 8 + length)
udp = struct.pack("!HHHH", 9, port, 0, 0xFFFF)
before_udp = len(ethernet + ipv6 + hop_by_hop)
offload = struct.pack("=BBHHHH", NEEDS_CSUM, 0, 0, 0, before_udp, 6)

link = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
link.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
link.bind(("lo", 0))
link.send(offload + ethernet + ipv6 + hop_by_hop + udp + b"j" * length)
