#[hopline::service]
trait Mail {
    #[rpc(oneway, finishes)]
    async fn send(&self);
}

fn main() {}
