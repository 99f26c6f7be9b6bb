//! The integration tests: one binary, real sockets on free ports, the real program in front of real receivers.
//!
//! `tests/run` installs what they need. A test whose program is missing fails and says so; a test that this machine
//! cannot run (no network namespaces, no capture) says SKIP and why, and `tests/run` counts it at its end.

mod support;

mod admin_orders;
mod cli;
mod codec;
mod compare;
mod config;
mod container;
mod dns;
mod doctor;
mod examples;
mod exchange;
mod faults;
mod fast_open;
mod hostile;
mod hostile_udp;
mod inherited;
mod integrity;
mod kubernetes;
mod load;
mod log;
mod look;
mod measured;
mod monitoring;
mod names;
mod netns;
mod page;
mod pools;
mod problems;
mod readme;
mod receivers;
mod reload;
mod requested;
mod scaling;
mod see;
mod see_udp;
mod stopping;
mod syscalls;
mod systemd;
mod tidy;
mod top;
mod traffic;
mod two_hosts;
mod udp;
mod udp_load;
mod udp_netns;
mod unix;
mod upgrade;
