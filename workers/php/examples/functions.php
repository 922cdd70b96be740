<?php

// Functions in PHP, behind PHP's own server:
//
//     durable dev                                                  # the service, in another terminal
//     php workers/php/examples/functions.php provision             # once: prints DURABLE_APP_ID and DURABLE_SIGNING_KEY to export
//     PHP_CLI_SERVER_WORKERS=4 php -S localhost:8000 workers/php/examples/functions.php
//     php workers/php/examples/functions.php send                  # an order

declare(strict_types=1);

use Durable\Functions\App;
use Durable\Functions\Client;
use Durable\Functions\Definition;
use Durable\Functions\Event;
use Durable\Functions\Failed;
use Durable\Functions\Step;

require __DIR__ . '/../autoload.php';

$service = getenv('DURABLE_URL') ?: 'http://localhost:3030';
$here = getenv('APP_URL') ?: 'http://localhost:8000';
$id = getenv('DURABLE_APP_ID') ?: '';
$key = getenv('DURABLE_SIGNING_KEY') ?: '';

$app = new App('shop', [
    new Definition(
        'fulfil-order',
        event: 'order/created',
        retries: 3,
        concurrency: ['limit' => 5, 'key' => 'customer'],
        handler: static function (Step $step, Event $event): array {
            $charge = $step->run('charge', static fn (): array => ['receipt' => "r-{$event->data->id}", 'total' => $event->data->total]);
            $step->sleep('cool-off', 0.2);
            $packed = $step->waitForEvent('packed', 'order/packed', match: ['id' => $event->data->id], timeout: '1 hour');
            if ($packed === null) {
                throw new RuntimeException('nobody has packed it');
            }
            $step->sendEvent('tell', ['name' => 'order/fulfilled', 'data' => ['id' => $event->data->id]]);

            return ['receipt' => $charge->receipt, 'box' => $packed->data->box];
        },
        onFailure: static function (Step $step, Event $event, Failed $failed): void {
            $step->run('apologise', static fn (): string => "sorry: $failed->message");
        },
    ),
], keys: $key === '' ? [] : [$key]);

if (PHP_SAPI !== 'cli') {
    $app->serve();

    return;
}

switch ($argv[1] ?? '') {
    case 'provision':
        $made = Client::provision($service, 'shop', 'dev', $here, getenv('DURABLE_ADMIN_TOKEN') ?: null);
        (new Client($service, $made->appId, $made->signingKey))->sync($app);
        echo "export DURABLE_APP_ID=$made->appId DURABLE_SIGNING_KEY=$made->signingKey\n";
        break;
    case 'send':
        $client = new Client($service, $id, $key);
        $order = $argv[2] ?? 'o-' . random_int(1, 9999);
        echo json_encode($client->send('order/created', ['id' => $order, 'total' => 42, 'customer' => 'c-1'])), "\n";
        $client->send('order/packed', ['id' => $order, 'box' => 7]);
        break;
    default:
        fwrite(STDERR, "php {$argv[0]} provision | send [ORDER]\n");
        exit(2);
}
