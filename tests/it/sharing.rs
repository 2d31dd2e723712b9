//! Prefetch is the load balancing: whoever is free takes the next call.

use futures::FutureExt as _;
use hopline::{Client, Running};
use tokio::sync::mpsc;

use crate::support::{Arrival, Held, Scene, hold, soon};

/// A server that is given a call at a time, and the call that it has.
struct Single {
    _running: Running,
    arrived: mpsc::UnboundedReceiver<Arrival>,
    holds: Option<Arrival>,
}

impl Single {
    async fn serve(scene: &Scene) -> Self {
        let Held { service, arrived } = Held::new();
        // It would run a second call at once, were it given one.
        Self { _running: scene.serve(service.prefetch(1)).await, arrived, holds: None }
    }

    /// Waits for the call that it takes, since it is free.
    async fn takes(&mut self) {
        assert!(self.holds.is_none(), "it is not free");
        self.holds = Some(soon(self.arrived.recv()).await.expect("it takes the next"));
    }

    fn lets_go(&mut self) {
        self.holds.take().expect("it has one").release();
    }

    fn has_no_other(&mut self) -> bool {
        self.arrived.recv().now_or_never().is_none()
    }
}

/// Calls that nobody waits for.
async fn call(client: &Client, calls: u64) {
    for number in 0..calls {
        let pending = hold(client, number).start().await.expect("on its way");
        tokio::spawn(async { pending.await.expect("answered") });
    }
}

#[tokio::test]
async fn whoever_is_free_takes_the_next_call_and_nobody_else_does() {
    let scene = Scene::new();
    let (mut one, mut two) = (Single::serve(&scene).await, Single::serve(&scene).await);
    let client = scene.client().await;
    call(&client, 40).await;
    one.takes().await;
    two.takes().await;
    // However long the other one takes over its call.
    for _ in 0..10 {
        two.lets_go();
        two.takes().await;
        assert!(one.has_no_other(), "it got a second call beside the one that it runs");
    }
    for _ in 0..10 {
        one.lets_go();
        one.takes().await;
        assert!(two.has_no_other(), "it got a second call beside the one that it runs");
    }
    // Who comes later takes its part of those that wait.
    let mut three = Single::serve(&scene).await;
    for _ in 0..10 {
        three.takes().await;
        three.lets_go();
    }
    assert!(one.has_no_other() && two.has_no_other(), "it got a second call beside the one that it runs");
}
