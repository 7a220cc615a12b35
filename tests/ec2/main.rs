//! The ec2 ring: whole bakes, imports and verbs against the EC2-shaped server (tools/ec2-server). Needs what the root
//! ring needs. Its tests are threads of one process: see `oven_testing::ring`.

mod cli;
mod direct;
mod egress;
mod faults;
mod import;
mod policy;
mod stop;
mod verbs;
