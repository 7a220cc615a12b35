//! Disks by their blocks, in AWS: no volume, and no instance.

mod faults;
mod program;
mod stop;
