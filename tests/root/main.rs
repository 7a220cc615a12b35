//! The root ring: needs root and loop devices, and the base images that `scripts/test root` makes. Its tests are
//! threads of one process: what looks at more than its own takes the ring's lock (`oven_testing::ring`).

mod bake;
mod cli;
mod direct;
mod disk;
mod docs;
mod hostile;
mod packages;
mod plugin;
mod situations;
mod steps;
