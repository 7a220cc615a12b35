//! Packages whose scripts misbehave, baked by `oven` itself: each has the right outcome, nothing is left, and nothing
//! of the host has changed. Needs root, `OVEN_TEST_TINY` and `OVEN_TEST_BASE`; what a test downloads it says.

#[path = "support/disk.rs"]
mod disk;
#[path = "hostile/host.rs"]
mod host;
#[path = "hostile/lab.rs"]
mod lab;
#[path = "support/world.rs"]
mod world;

#[path = "hostile/daemons.rs"]
mod daemons;
#[path = "hostile/escapes.rs"]
mod escapes;
#[path = "hostile/kept.rs"]
mod kept;
#[path = "hostile/network.rs"]
mod network;
#[path = "hostile/planted.rs"]
mod planted;
#[path = "hostile/real.rs"]
mod real;
#[path = "hostile/space.rs"]
mod space;
