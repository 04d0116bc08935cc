//! The trajectory store of pmdflow.
