//! EC2, as far as it goes without a device: the cloud's part of a bake against the EC2-shaped server, row by row of
//! what can go wrong with it. What counts is the server's ledger: it holds exactly what it should, with our tags.
//!
//! By step: 0 preflight, 1 look-up, 3 volume, 4 attach, 5 discovery, 13 and 14 snapshot, 15 and 16 register and verify,
//! 19 cleaning up. Tests are named by the row.

mod calls;
mod case;
mod classes;
mod fixture;
mod random_plans;
mod s00_preflight;
mod s00_role;
mod s01_lookup;
mod s03_volume;
mod s04_attach;
mod s13_background;
mod s13_snapshot;
mod s15_register;
mod s15_verify;
mod s19_cleanup;
mod stop;
