//! Disks of this machine: how they are found, attached, mounted and released, and what they lose.

mod attributes;
mod hostile;
mod lost_writes;
mod mount;
mod nvme;
mod region;
