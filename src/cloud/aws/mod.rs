//! Amazon's cloud: EC2, EBS direct, and the instance that oven runs on.

#[cfg(feature = "aws")]
pub mod ebs;
#[cfg(feature = "aws")]
pub mod ec2;
#[cfg(feature = "aws")]
pub mod imds;
pub mod nvme;
