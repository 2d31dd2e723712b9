//! The prefetch balances the load: an instance that is free gets the next call.

use hopline::{Client, Running};
use tokio::sync::mpsc;

use crate::support::{Arrival, Held, Scene, has_read, hold, soon};

/// A server that gets one call at a time, and the call that it has.
struct Single {
    running: Running,
    arrived: mpsc::UnboundedReceiver<Arrival>,
    holds: Option<Arrival>,
}

impl Single {
    async fn serve(scene: &Scene) -> Self {
        let Held { service, arrived } = Held::new();
        // The service would run a second call if it got one.
        Self { running: scene.serve(service.prefetch(1)).await, arrived, holds: None }
    }

    /// Waits for the call that it gets, since it is free.
    async fn takes(&mut self) {
        assert!(self.holds.is_none(), "it is not free");
        self.holds = Some(soon(self.arrived.recv()).await.expect("it takes the next"));
    }

    fn lets_go(&mut self) {
        self.holds.take().expect("it has one").release();
    }

    /// Checks that it runs no call beside the one that it has. A call that it had been given would have arrived before
    /// the one that is sent now.
    async fn has_no_other(&mut self, client: &Client) {
        has_read(client, "held", self.running.instance()).await;
        let other = self.arrived.try_recv();
        assert!(other.is_err(), "it got a second call beside the one that it runs: {other:?}");
    }
}

/// Makes calls that nobody waits for.
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
    // However long the other instance takes for its call.
    for _ in 0..10 {
        two.lets_go();
        two.takes().await;
        one.has_no_other(&client).await;
    }
    for _ in 0..10 {
        one.lets_go();
        one.takes().await;
        two.has_no_other(&client).await;
    }
    // A new instance takes its share of the calls that wait.
    let mut three = Single::serve(&scene).await;
    for _ in 0..10 {
        three.takes().await;
        three.lets_go();
    }
    one.has_no_other(&client).await;
    two.has_no_other(&client).await;
}
