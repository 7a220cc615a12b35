//! Packages, scripts and files of a definition in small systems with the real package managers.

mod ansible;
mod archive;
mod debian;
mod progress;
mod provision;
mod provisioners;
mod rpm;
