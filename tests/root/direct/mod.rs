//! Disks that are served by their blocks, on a local region.

mod calls;
mod faults;
mod program;
mod rows;
