//! The straggler rule: which groups wait only for their last members, until when, and what expires.

use std::collections::{BTreeMap, BTreeSet, btree_map::Entry};

use crate::{
    clock::Micros, error::Result, log::Arrays, state::group::Group, state::record::Record, state::trajectory::Verdict,
    store::Store,
};

/// Reports that are kept for a caller that does not take them.
const KEPT_REPORTS: usize = 1024;

/// A group that became ready without its late members.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs, reason = "fields that say themselves")]
pub struct LateReport {
    pub group: u64,
    pub prompt_id: String,
    /// Late members.
    pub members: u32,
    /// Their generated tokens.
    pub tokens: u64,
}

/// The groups whose time runs, and until when: soft state, which begins anew when the store is opened.
#[derive(Debug, Clone, Default)]
pub struct Overdue {
    until: BTreeMap<u64, Micros>,
    deadlines: BTreeSet<(Micros, u64)>,
}

impl Overdue {
    fn insert(&mut self, group: u64, deadline: Micros) {
        if let Entry::Vacant(entry) = self.until.entry(group) {
            entry.insert(deadline);
            self.deadlines.insert((deadline, group));
        }
    }

    fn remove(&mut self, group: u64) {
        if let Some(deadline) = self.until.remove(&group) {
            self.deadlines.remove(&(deadline, group));
        }
    }

    fn expired(&self, now: Micros) -> Vec<u64> {
        self.deadlines.range(..=(now, u64::MAX)).map(|(_, group)| *group).collect()
    }

    /// The groups, in the order of their ids.
    pub fn groups(&self) -> impl Iterator<Item = u64> + '_ {
        self.until.keys().copied()
    }

    /// When the time of the first group is over.
    pub fn next_deadline(&self) -> Option<Micros> {
        self.deadlines.first().map(|(deadline, _)| *deadline)
    }
}

impl Store {
    /// Makes every group ready whose time for its late members is over.
    pub(crate) fn expire_groups(&mut self, now: Micros) -> Result<()> {
        let Some(straggler) = self.settings.straggler else { return Ok(()) };
        let overdue = self.overdue.get_or_insert_with(|| {
            let mut overdue = Overdue::default();
            let groups = self.state.groups.iter().filter(|(_, group)| group.is_overdue(straggler));
            groups.for_each(|(id, _)| overdue.insert(*id, now.saturating_add(straggler.wait)));
            overdue
        });
        let expired = overdue.expired(now);
        if expired.is_empty() {
            return Ok(());
        }
        let mut reports = Vec::new();
        for id in &expired {
            let group = self.state.group(*id)?.clone();
            reports.push(self.late_report(*id, &group)?);
            group.members().try_for_each(|member| self.end_lease(member))?;
        }
        self.record(&Record::Late(expired.clone()), &Arrays::default())?;
        for id in expired {
            self.forget_overdue(id);
            self.judge(id)?;
        }
        self.late_reports.extend(reports);
        self.late_reports.drain(..self.late_reports.len().saturating_sub(KEPT_REPORTS));
        Ok(())
    }

    fn late_report(&self, id: u64, group: &Group) -> Result<LateReport> {
        let mut report =
            LateReport { group: id, prompt_id: group.prompt_id.clone(), members: group.pending, tokens: 0 };
        for member in group.members() {
            let trajectory = self.state.trajectory(member)?;
            report.tokens += if trajectory.verdict == Verdict::Pending { u64::from(trajectory.generated()) } else { 0 };
        }
        Ok(report)
    }

    /// Stops the time of a group that is gone.
    pub(crate) fn forget_overdue(&mut self, id: u64) {
        if let Some(overdue) = &mut self.overdue {
            overdue.remove(id);
        }
    }

    /// Starts or stops the time of a group that has one more verdict.
    pub(crate) fn watch_group(&mut self, id: u64, now: Micros) {
        let (Some(straggler), Some(overdue)) = (self.settings.straggler, &mut self.overdue) else { return };
        if self.state.groups.get(&id).is_some_and(|group| group.is_overdue(straggler)) {
            overdue.insert(id, now.saturating_add(straggler.wait));
        } else {
            overdue.remove(id);
        }
    }

    /// Takes the reports of groups that became ready without their late members; the oldest of very many are lost.
    pub fn take_late_reports(&mut self) -> Vec<LateReport> {
        self.late_reports.drain(..).collect()
    }
}
