//! Limits of traffic on the wire.

use super::fields::Fields;
use crate::limits;
use crate::quantity::Rate;
use crate::validate::FieldErrors;

/// Reads the limit of the disks; 0 stands for no limit.
pub(super) fn disk(fields: &mut Fields, errors: &mut FieldErrors) -> Option<Rate> {
    const CODE: &str = "invalid_disk_io_bps";
    let (least, most) = (Rate(limits::DISK_RATE_MIN.0), Rate(limits::DISK_RATE_MAX.0));
    let rate: Rate = fields.parsed("disk_io_bps", CODE, errors)?;
    if rate.0 > 0 && !(least..=most).contains(&rate) {
        errors.push(fields.path("disk_io_bps"), CODE, format!("must be 0, or from {least} to {most}"));
    }
    Some(rate)
}
