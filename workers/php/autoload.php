<?php

// Loads the classes where Composer is not used.

declare(strict_types=1);

spl_autoload_register(static function (string $class): void {
    foreach (['Durable\\Functions\\' => '/src/Functions/', 'Durable\\Worker\\' => '/src/'] as $prefix => $folder) {
        if (str_starts_with($class, $prefix)) {
            $path = __DIR__ . $folder . str_replace('\\', '/', substr($class, strlen($prefix))) . '.php';
            if (is_file($path)) {
                require $path;
            }
        }
    }
});
