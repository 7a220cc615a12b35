//! Checks whether this machine can bake (`oven doctor`).

pub mod checks;
pub mod probes;
