//! The code that the rings of oven's tests share. Each test creates its own world with this crate. The world takes the
//! ring's lock (see [`ring`]), so that no test has to remember the lock.
//!
//! | what a test needs | type |
//! |---|---|
//! | a local region, and `oven` on it | [`LocalWorld`] |
//! | a builder in AWS, by the EC2-shaped server | [`Ec2World`] |
//! | a small Debian over which packages are installed | [`PackageLab`] |
//! | the same with dnf, zypper and rpm | [`RpmLab`] |
//! | a root directory with busybox, for single steps | [`BusyboxImage`] |
//! | a disk in a file, on a loop device | [`LoopDisk`] |
//! | a program on a terminal, and its screen | [`Terminal`] |
//! | to read an image's file system without mounting it | [`ImageReader`], [`disk::tree`] |

pub mod busybox_image;
pub mod direct;
pub mod disk;
pub mod ec2_world;
pub mod local_world;
pub mod packages;
pub mod programs;
pub mod ring;
pub mod seeds;
pub mod terminal;

pub use busybox_image::BusyboxImage;
pub use disk::image_reader::ImageReader;
pub use disk::loop_disk::LoopDisk;
pub use ec2_world::Ec2World;
pub use local_world::{LocalWorld, stderr};
pub use packages::package_lab::PackageLab;
pub use packages::rpm_lab::RpmLab;
pub use seeds::{Dice, each, full, pause, seeds};
pub use terminal::{EndedTerminal, Terminal};

use std::time::{Duration, Instant};

/// Waits until `find` returns something. Fails with `what` after a minute, which is long even on a busy machine.
#[track_caller]
pub fn until<T>(what: &str, mut find: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(found) = find() {
            return found;
        }
        assert!(Instant::now() < deadline, "waiting for {what}");
        pause(Duration::from_millis(2));
    }
}
